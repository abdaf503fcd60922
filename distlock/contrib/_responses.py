"""What a view answers: as it is kept, as it is replayed, and the errors of `http.py`."""

from __future__ import annotations

import base64
from typing import Any

from django.http import HttpResponse, JsonResponse

NOT_KEPT = ("set-cookie", "date", "connection", "transfer-encoding")
REPLAYED = "Idempotency-Replayed"


def render(response: Any, request: Any) -> None:
    """Render what a view only described: a template, or data of Django REST framework."""
    if hasattr(request, "accepted_renderer") and hasattr(response, "data"):
        # As finalize_response() does, but that comes when the view has returned.
        response.accepted_renderer = request.accepted_renderer
        response.accepted_media_type = request.accepted_media_type
        response.renderer_context = request.parser_context["view"].get_renderer_context()
    if callable(getattr(response, "render", None)):
        response.render()


def kept(response: HttpResponse) -> dict[str, Any]:
    """Return what JSON can express of a response: no cookies, they are for one client once."""
    headers = [pair for pair in response.items() if pair[0].lower() not in NOT_KEPT]
    what = {"status": response.status_code, "headers": headers}
    try:
        return {**what, "text": response.content.decode()}
    except UnicodeDecodeError:
        return {**what, "base64": base64.b64encode(response.content).decode()}


def replayed(what: dict[str, Any]) -> HttpResponse:
    """Return a response that was kept."""
    # Bytes: of a str Django would make others where the header names another charset.
    content = what["text"].encode() if "text" in what else base64.b64decode(what["base64"])
    response = HttpResponse(content, status=what["status"], headers=dict(what["headers"]))
    response[REPLAYED] = "true"
    return response


def problem(status: int, title: str, detail: str, docs: str = "") -> HttpResponse:
    """Return an error as RFC 9457 describes it, with a link to the documentation."""
    what = {"type": docs or "about:blank", "title": title, "status": status, "detail": detail}
    response = JsonResponse(what, status=status, content_type="application/problem+json")
    if docs:
        response["Link"] = f'<{docs}>; rel="describedby"; type="text/html"'
    return response
