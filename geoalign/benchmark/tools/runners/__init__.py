"""Scripts for the environments of the tools; they import nothing of geoalign, and nothing here imports them."""
