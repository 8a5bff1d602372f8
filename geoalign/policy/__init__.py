"""A policy: model and codec, the files that hold it, the door that opens them."""
