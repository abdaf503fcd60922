"""Views for the tests of `distlock.contrib.http`, and the urlconf that has them.

Each counts its calls in the table of counters; `during` is called in the middle, and may fail.
"""

from __future__ import annotations

from typing import Any

from asgiref.sync import sync_to_async
from django.db import transaction
from django.http import HttpRequest, HttpResponse, JsonResponse, StreamingHttpResponse
from django.template import engines
from django.template.response import TemplateResponse
from django.urls import path
from django.utils.decorators import method_decorator
from django.views import View
from django.views.decorators.csrf import csrf_exempt
from rest_framework.authentication import BasicAuthentication
from rest_framework.decorators import action, api_view, authentication_classes, permission_classes
from rest_framework.exceptions import ValidationError
from rest_framework.parsers import BaseParser, JSONParser
from rest_framework.permissions import BasePermission
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.views import APIView
from rest_framework.viewsets import ViewSet

from distlock.contrib.http import idempotent
from tests.app.models import Counter


def during() -> Any:
    """Do nothing: the tests put something in its place."""


def work() -> int:
    """The effect: one more counter. Returns how many there are."""
    number = Counter.objects.count() + 1
    Counter.objects.create(name=f"effect {number}")
    during()
    return number


@csrf_exempt
@idempotent(docs="https://example.com/keys")
def pay(request: HttpRequest) -> HttpResponse:
    return JsonResponse({"n": work()}, status=201, headers={"Location": "/payments/ü"})


@idempotent
def with_csrf(request: HttpRequest) -> HttpResponse:
    files = [file.read().decode() for file in request.FILES.values()]
    return JsonResponse({"n": work(), "files": files})


@idempotent
def image(request: HttpRequest) -> HttpResponse:
    response = HttpResponse(b"\x89PNG\xff%d" % work(), content_type="image/png")
    response.set_cookie("secret", "of the first")
    response["Set-Cookie"] = "another=secret"
    return response


@idempotent
def text(request: HttpRequest, charset: str) -> HttpResponse:
    return HttpResponse(b"\xc3\xa9\x00", content_type=f"text/plain; charset={charset}")


@idempotent(required=False)
def optional(request: HttpRequest) -> HttpResponse:
    return JsonResponse({"n": work()})


@idempotent(anonymous="session")
def for_sessions(request: HttpRequest) -> HttpResponse:
    return JsonResponse({"n": work()})


@idempotent(anonymous=lambda request: request.headers.get("Api-Key", ""))
def for_machines(request: HttpRequest) -> HttpResponse:
    return JsonResponse({"n": work()})


@idempotent
def answers(request: HttpRequest, status: int) -> HttpResponse:
    return JsonResponse({"n": work()}, status=status)


@idempotent(final=lambda response: response.status_code != 404)
def own_rule(request: HttpRequest, status: int) -> HttpResponse:
    return JsonResponse({"n": work()}, status=status)


@idempotent(atomic=False)
def loose(request: HttpRequest, status: int) -> HttpResponse:
    return JsonResponse({"n": work()}, status=status)


@idempotent
def rolled_back(request: HttpRequest) -> HttpResponse:
    number = work()
    transaction.set_rollback(True)
    return JsonResponse({"n": number})


def work_and_rolled_back(request: HttpRequest) -> HttpResponse:
    work()
    response: HttpResponse = rolled_back(request)
    return response


@idempotent
def streamed(request: HttpRequest) -> StreamingHttpResponse:
    return StreamingHttpResponse([b"%d" % work()])


@idempotent
def template(request: HttpRequest) -> TemplateResponse:
    page = engines["django"].from_string("<p>{{ n }}</p>")
    return TemplateResponse(request, page, {"n": work})


@idempotent
def nothing(request: HttpRequest) -> None:
    work()


@idempotent(atomic=False)
async def in_coroutine(request: HttpRequest) -> HttpResponse:
    return JsonResponse({"n": await sync_to_async(work)()}, status=201)


@idempotent(atomic=False)
async def template_in_coroutine(request: HttpRequest) -> TemplateResponse:
    page = engines["django"].from_string("<p>{{ n }}</p>")
    return TemplateResponse(request, page, {"n": work})


class OnMethod(View):
    @idempotent
    def post(self, request: HttpRequest) -> HttpResponse:
        return JsonResponse({"n": work()})


class Undecorated(View):
    def get(self, request: HttpRequest) -> HttpResponse:
        return JsonResponse({"n": work()})

    def post(self, request: HttpRequest) -> HttpResponse:
        return JsonResponse({"n": work()})


@method_decorator(idempotent(keep=60), name="post")
class OnName(Undecorated):
    pass


@method_decorator(idempotent, name="dispatch")
class OnDispatch(Undecorated):
    pass


class OnCoroutine(View):
    @idempotent(atomic=False)
    async def post(self, request: HttpRequest) -> HttpResponse:
        return JsonResponse({"n": await sync_to_async(work)()})


class ReadsData(BasePermission):
    def has_permission(self, request: Request, view: Any) -> bool:
        return bool(request.data) or request.method == "POST"


class Rest(APIView):
    authentication_classes = (BasicAuthentication,)

    @idempotent
    def post(self, request: Request) -> Response:
        return Response({"n": work(), "got": request.data}, status=201)

    @idempotent
    def put(self, request: Request) -> Response:
        raise ValidationError({"n": work()})


class TextParser(BaseParser):
    media_type = "text/plain"

    def parse(self, stream: Any, media_type: Any = None, parser_context: Any = None) -> str:
        return str(stream.read().decode())


class RestReads(Rest):
    permission_classes = (ReadsData,)
    parser_classes = (JSONParser, TextParser)


@api_view(["POST"])
@authentication_classes([BasicAuthentication])
@permission_classes([ReadsData])
@idempotent
def rest_function(request: Request) -> Response:
    return Response({"n": work()})


class RestSet(ViewSet):
    authentication_classes = (BasicAuthentication,)

    @idempotent
    def create(self, request: Request) -> Response:
        return Response({"n": work()})

    @action(detail=False, methods=["post"])
    @idempotent
    def extra(self, request: Request) -> Response:
        return Response({"n": work()})


@method_decorator(idempotent, name="dispatch")
class RestWrong(Rest):
    pass


class RestWrongToo(Rest):
    @idempotent
    def dispatch(self, request: Any, *args: Any, **kwargs: Any) -> Any:
        return super().dispatch(request, *args, **kwargs)


urlpatterns = [
    path("pay", pay),
    path("pay/elsewhere", pay),
    path("with_csrf", with_csrf),
    path("image", image),
    path("text/<str:charset>", text),
    path("optional", optional),
    path("for_sessions", for_sessions),
    path("for_machines", for_machines),
    path("answers/<int:status>", answers),
    path("own_rule/<int:status>", own_rule),
    path("loose/<int:status>", loose),
    path("rolled_back", rolled_back),
    path("work_and_rolled_back", work_and_rolled_back),
    path("streamed", streamed),
    path("template", template),
    path("nothing", nothing),
    path("in_coroutine", in_coroutine),
    path("template_in_coroutine", template_in_coroutine),
    path("on_method", OnMethod.as_view()),
    path("on_name", OnName.as_view()),
    path("on_dispatch", OnDispatch.as_view()),
    path("as_view", idempotent(Undecorated.as_view())),
    path("on_coroutine", OnCoroutine.as_view()),
    path("rest", Rest.as_view()),
    path("rest_reads", RestReads.as_view()),
    path("rest_function", rest_function),
    path("rest_set", RestSet.as_view({"post": "create"})),
    path("rest_extra", RestSet.as_view({"post": "extra"})),
    path("rest_wrong", RestWrong.as_view()),
    path("rest_wrong_too", RestWrongToo.as_view()),
]
