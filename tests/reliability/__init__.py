"""Campaigns against the promises of docs/reliability.md: kills, damages, servers that hang, full disks.

A small sample of each is in the normal suite; the whole runs by ``-m slow``, or as a script that prints a table."""
