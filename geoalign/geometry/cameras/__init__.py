"""Camera files: the door that opens any of them, the formats it knows, the writer of our own."""
