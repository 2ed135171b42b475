"""Reports: what is made of records, from one run (`report`) or from two (`comparison`)."""
