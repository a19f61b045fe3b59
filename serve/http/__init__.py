"""The HTTP API and the page: routes, schemas, streaming, errors. No Ray."""
