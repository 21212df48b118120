"""What tests share besides fixtures; no tests in here."""
