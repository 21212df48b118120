"""Preference data, from any source to token batches. Imports no model and no engine (never ``diffdpo``)."""
