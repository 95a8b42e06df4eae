"""A run: its workdir, its inputs and its artefacts."""
