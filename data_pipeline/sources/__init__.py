"""From files and data sets of the field to records: ``files`` reads rows, ``formats`` turns rows into records."""
