"""Server of live sessions and videos: HTTP, WebSocket, and one thread that owns the model."""
