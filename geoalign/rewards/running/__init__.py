"""How rewards are run: in turns on one device, guarded, in processes of their own."""
