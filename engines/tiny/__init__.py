"""The built-in base model `tandem/tiny`: its corpus, the script that makes it, and the made model in `model/`."""
