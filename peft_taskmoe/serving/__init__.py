"""The HTTP server of extraction; importing it needs the extra `serve`."""

from ..optional import needed

for _module in ("fastapi", "prometheus_client", "uvicorn"):
    needed(_module, "serve")
