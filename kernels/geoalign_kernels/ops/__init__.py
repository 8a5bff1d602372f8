"""One folder per op: ``op.py`` (public, registered), ``reference.py`` (definition), ``triton_impl.py`` (kernels)."""
