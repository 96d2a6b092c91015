"""The admin API, as people who run a gateway and their programs meet it."""
