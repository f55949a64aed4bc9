"""Universal information extraction: schema and text in, typed records with offsets out."""
