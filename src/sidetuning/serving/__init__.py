"""A model over HTTP: requests of all clients and for all tasks share base passes (extra `serve`)."""
