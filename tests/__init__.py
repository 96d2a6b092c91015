"""The tests. `python3 check.py` installs what they need and runs them."""
