"""Every released SDK against one served gateway: `python -m tests.compat` writes docs/compatibility.md."""
