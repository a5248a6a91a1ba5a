"""What sites and server agree on: words, records, bytes, settings and errors. Imports neither side."""
