"""An engine process on a node of a Ray cluster: `python -m engines.on_ray` stands in for it on the gateway's machine.

Ray places an actor with the resources of the settings (`place`); the actor starts the same `engines.host` as on the
gateway's machine, and relays what it and the gateway say to each other over one encrypted connection (`channel`). The
program here is the other end of it (`relay`), and what the gateway sees: its socket, its page of vital signs, its exit
status. When the actor or its node is lost the program ends, and the gateway starts a new one.
"""
