"""Jobs from files to files, one module a verb; the command line parses and prints, these do."""
