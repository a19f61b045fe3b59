"""Text generation by continuous batching: engine, scheduler, sampling. No Ray, no HTTP."""
