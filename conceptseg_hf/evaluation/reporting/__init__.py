"""Reports: tables and pages computed from the records of one run (`report`) or of two (`comparison`)."""
