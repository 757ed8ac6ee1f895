"""An HTTP server of completions: one thread decodes all requests together, an event loop talks to the clients."""
