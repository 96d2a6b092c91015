"""Several processes that compute one engine's calls together: starting them, following, and noticing that one is gone.

Rank 0 is the engine process. It starts the others, and tells each call to all of them as bytes; what a call means, and
which collectives it takes, is the plugin's. Nothing here knows a model, and nothing that is sent is unpickled.
"""
