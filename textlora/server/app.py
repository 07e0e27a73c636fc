"""The FastAPI application: routes and their documentation."""

import asyncio
import base64
import hashlib
import json
import re
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Request, Security
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from fastapi.routing import APIRoute
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic import BaseModel, ValidationError
from pydantic_core import to_json
from starlette.exceptions import HTTPException

from textlora.server import schemas
from textlora.server.folders import Folders
from textlora.server.http_errors import HTTP_TEXTS, Refusal, unauthorized
from textlora.server.keys import Key, KeyRing
from textlora.server.metrics import CONTENT_TYPE
from textlora.server.middleware import Outer
from textlora.server.protocols import classified, label_scores, texts_of
from textlora.server.service import Answers, Service

SAID = {
    400: "The request cannot be answered as it is.",
    401: "No key, or a wrong one.",
    403: "The key may not do this.",
    404: "No such adapter among those the key may use.",
    408: "The body did not come in time.",
    413: "Too large: body, text or batch.",
    422: "The body does not have the shape described.",
    424: "The adapter's folder is damaged or gone.",
    429: "Too many requests wait; Retry-After says when to come again.",
    500: "A bug.",
    503: "Shutting down, or what computes is being started again.",
    504: "Not done in time.",
}


def _said(what: str) -> dict[int | str, dict[str, Any]]:
    return {200: {"content": {"text/plain": {"schema": {"type": "string"}}}, "description": what}}


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": schemas.ErrorBody, "description": SAID[status]} for status in statuses}


_PREDICTS = _errors(400, 401, 404, 408, 413, 422, 424, 429, 500, 503, 504)
_MANAGES = _errors(400, 401, 403, 404, 408, 413, 422, 500, 503)
_JSON = re.compile(r"application/(?:[\w.+-]+\+)?json\s*(?:;|$)", re.IGNORECASE)
_bearer = HTTPBearer(auto_error=False, description="A key of --api-keys or TEXTLORA_API_KEY.")


# Async although they wait for nothing: FastAPI sends plain functions through a thread pool, twice for each
# request.
async def _service(request: Request) -> Service:
    return request.app.state.service


async def _key(request: Request) -> Key:
    key = request.state.key
    if key is None:
        raise unauthorized()
    request.state.facts["client"] = key.name
    return key


async def _documented_key(
    request: Request, _: Annotated[HTTPAuthorizationCredentials | None, Security(_bearer)]
) -> Key:
    return await _key(request)


Serving, Client = Annotated[Service, Depends(_service)], Annotated[Key, Depends(_documented_key)]


class Quick(APIRoute):
    """A route that FastAPI describes and does not run: its way to the same call takes longer than all else
    that a request needs."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        body_type = self.endpoint.__annotations__["body"]

        async def handle(request: Request) -> Response:
            key = await _key(request)
            body = _read(body_type, await request.body(), request.headers.get("content-type", ""))
            return await self.endpoint(
                service=request.app.state.service, key=key, body=body, request=request, **request.path_params
            )

        return handle


def _read(kind: type[BaseModel], data: bytes, content_type: str) -> BaseModel:
    """A body. Raises Refusal and pydantic's ValidationError."""
    if not _JSON.match(content_type):
        raise Refusal(422, "the Content-Type is not application/json")
    try:
        found = json.loads(data)
    except json.JSONDecodeError:
        raise Refusal(422, "the body is not JSON") from None
    except (ValueError, RecursionError):
        raise Refusal(400, HTTP_TEXTS[400]) from None
    return kind.model_validate(found)


router = APIRouter()
quick = APIRouter(route_class=Quick)


async def _while_connected(request: Request, work: Coroutine[Any, Any, Answers]) -> Answers:
    """The result of `work`, which is cancelled when the client goes."""
    task = asyncio.current_task()
    assert task is not None
    gone = asyncio.ensure_future(_disconnected(request, task))
    try:
        return await work
    except asyncio.CancelledError:
        if not gone.done():
            raise
        task.uncancel()
        raise ConnectionResetError from None
    finally:
        gone.cancel()


async def _disconnected(request: Request, task: asyncio.Task) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    task.cancel()


def _headers(service: Service, answers: Answers) -> dict[str, str]:
    """Cost of a request, in TEI's headers: characters, tokens, whole milliseconds."""
    return {
        "x-compute-type": service.facts["device"],
        "x-compute-characters": str(answers.characters),
        "x-compute-tokens": str(answers.tokens),
        "x-queue-time": str(round(answers.queued * 1e3)),
        "x-inference-time": str(round(answers.ran * 1e3)),
        "x-total-time": str(round((answers.queued + answers.ran) * 1e3)),
    }


def _json(value: Any, headers: dict[str, str]) -> Response:
    return Response(to_json(value), headers=headers, media_type="application/json")


async def _predict(
    service: Service, key: Key, body: schemas.PredictRequest, request: Request, name: str | None, nested: bool
) -> Response:
    options = body.parameters or schemas.Parameters()
    names = service.select(key, name, body.model, options.adapter_id)
    several = isinstance(body.model, list) or isinstance(options.adapter_id, list)
    texts, batch = texts_of(body.inputs)
    answers = await _while_connected(request, service.answer(texts, names, whole=body.truncate is False))
    request.state.facts |= {"texts": len(texts), "adapters": len(names), "tokens": answers.tokens}
    shown: list[Any] = []
    for row in answers.rows:
        scored = [label_scores(one, body.raw_scores, options.function_to_apply, options.top_k) for one in row]
        shown.append(dict(zip(names, scored, strict=True)) if several else scored[0])
    return _json(shown if batch or nested else shown[0], _headers(service, answers))


_predicts: dict[str, Any] = {
    "response_model": schemas.PredictAnswer,
    "responses": _PREDICTS,
    "tags": ["predict"],
}
_classifies: dict[str, Any] = {
    "response_model": schemas.ClassifyAnswer,
    "responses": _PREDICTS,
    "tags": ["predict"],
}


@quick.post("/predict", summary="Labels and scores, as text-embeddings-inference", **_predicts)
async def predict(service: Serving, key: Client, body: schemas.PredictRequest, request: Request) -> Response:
    return await _predict(service, key, body, request, None, False)


@quick.post(
    "/",
    summary="For huggingface_hub's InferenceClient: a list for each text where `parameters` are sent",
    **_predicts,
)
async def hub_predict(
    service: Serving, key: Client, body: schemas.PredictRequest, request: Request
) -> Response:
    return await _predict(service, key, body, request, None, "parameters" in body.model_fields_set)


@quick.post("/adapters/{name}/predict", summary="As /predict, for one adapter", **_predicts)
async def adapter_predict(
    service: Serving, key: Client, name: str, body: schemas.PredictRequest, request: Request
) -> Response:
    return await _predict(service, key, body, request, name, False)


@quick.post("/adapters/{name}", summary="As /, for one adapter: the URL for an InferenceClient", **_predicts)
async def adapter_hub_predict(
    service: Serving, key: Client, name: str, body: schemas.PredictRequest, request: Request
) -> Response:
    return await _predict(service, key, body, request, name, "parameters" in body.model_fields_set)


@quick.post("/classify", summary="Labels and probabilities in class order, as vLLM", **_classifies)
@quick.post("/v1/classify", summary="As /classify, as SGLang", **_classifies)
async def classify(
    service: Serving, key: Client, body: schemas.ClassifyRequest, request: Request
) -> Response:
    names = service.select(key, None, body.model)
    texts = [(text, None) for text in ([body.input] if isinstance(body.input, str) else body.input)]
    answers = await _while_connected(request, service.answer(texts, names))
    request.state.facts |= {"texts": len(texts), "adapters": len(names), "tokens": answers.tokens}
    shown = classified(answers, names, isinstance(body.model, list), body.use_activation is not False)
    return _json(shown, _headers(service, answers))


def _card(service: Service, name: str, details: bool = False) -> dict[str, Any] | None:
    found = service.bank.card(name)
    if found is None:
        return None
    card = {
        "id": name, "object": "model", "created": service.created, "owned_by": "textlora", "root": name, "parent": service.facts["base_name"],
        "problem_type": found.problem_type, "pairs": found.pairs, "num_labels": len(found.labels),
    }  # fmt: skip
    return card | ({"labels": list(found.labels), "max_length": found.max_length} if details else {})


@router.get(
    "/v1/models",
    summary="Adapters that the key may use",
    response_model=schemas.ModelList,
    responses=_errors(401, 500),
    tags=["adapters"],
)
async def models(service: Serving, key: Client) -> Response:
    cards = [_card(service, name) for name in service.visible(key)]
    return JSONResponse({"object": "list", "data": [card for card in cards if card is not None]})


_one = {
    "response_model": schemas.ModelDetails,
    "responses": _errors(401, 404, 422, 500),
    "tags": ["adapters"],
}


@router.get("/v1/models/{name}", summary="One adapter, with its labels", **_one)
async def model(service: Serving, key: Client, name: str) -> Response:
    service.check_name(key, name)
    card = _card(service, name, details=True)
    if card is None:
        raise Refusal(404, f"no adapter '{name}'")
    return JSONResponse(card)


manage = APIRouter(tags=["adapters"])
_manages: dict[str, Any] = {"response_class": Response, "responses": _MANAGES | _said("What was done.")}


async def _manager(key: Client) -> Key:
    if not key.manage:
        raise Refusal(403, "this key may not load or unload adapters")
    return key


Manager = Annotated[Key, Depends(_manager)]


@manage.post("/v1/load_lora_adapter", summary="Load an adapter folder, as vLLM", **_manages)
async def load(request: Request, key: Manager, body: schemas.LoadRequest) -> Response:
    await request.app.state.folders.load(key, body.lora_name, body.lora_path, body.load_inplace)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")


@manage.post(
    "/v1/unload_lora_adapter", summary="Unload an adapter when its last batch is done, as vLLM", **_manages
)
async def unload(request: Request, service: Serving, key: Manager, body: schemas.UnloadRequest) -> Response:
    service.check_name(key, body.lora_name)
    await request.app.state.folders.unload(body.lora_name)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


@router.get(
    "/health",
    summary="Whether the process works",
    response_model=schemas.Status,
    responses=_errors(500, 503),
    tags=["server"],
)
async def health(service: Serving) -> Response:
    if not service.ready:
        raise Refusal(503, "what computes is not there")
    return JSONResponse({"status": "ok"})


@router.get(
    "/ready",
    summary="Whether to send requests here",
    response_model=schemas.Status,
    responses=_errors(500, 503),
    tags=["server"],
)
async def ready(service: Serving) -> Response:
    if not service.ready:
        raise Refusal(503, "not ready")
    return JSONResponse({"status": "ready"})


@router.get(
    "/info",
    summary="Base model and limits",
    response_model=schemas.Info,
    responses=_errors(401, 500),
    tags=["server"],
)
async def info(request: Request, service: Serving, key: Client) -> Response:
    settings, default = service.settings, service.settings.default_adapter
    default = default if default and key.sees(default) else None
    card = service.bank.card(default) if default else None
    labels = {str(i): label for i, label in enumerate(card.labels)} if card else {}
    return JSONResponse({
        "model_id": service.facts["base_name"], "model_sha": service.facts["base_hash"], "model_dtype": "float32",
        "model_type": {"classifier": {"id2label": labels, "label2id": {label: int(i) for i, label in labels.items()}}},
        "max_concurrent_requests": settings.queue_rows, "max_input_length": card.max_length if card else service.facts["max_length"],
        "max_batch_tokens": settings.batch_tokens, "max_client_batch_size": settings.max_client_batch_size,
        "max_text_chars": settings.max_text_chars, "auto_truncate": True, "tokenization_workers": 1, "version": version("textlora"), "executor": service.facts["executor"],
        "adapters": len(service.visible(key)), "default_adapter": default, "can_load": bool(settings.load_from) and key.manage,
    })  # fmt: skip


@router.get("/metrics", summary="Numbers for Prometheus; for keys that see all adapters", response_class=Response,
            responses=_errors(401, 403, 500) | _said("Prometheus text format."), tags=["server"])  # fmt: skip
async def metrics(service: Serving, key: Client) -> Response:
    if not key.sees_all:
        raise Refusal(403, "these numbers are of all adapters; the key sees some")
    return Response(await asyncio.to_thread(service.metrics.page), media_type=CONTENT_TYPE)


class Page:
    """An HTML file with its own inline style and script, and the policy that allows nothing else."""

    def __init__(self, name: str):
        self.text = (Path(__file__).parent / name).read_text(encoding="utf-8")
        allowed = {tag: self._hashes(tag) for tag in ("style", "script")}
        self.policy = (
            f"default-src 'none'; style-src {allowed['style']}; script-src {allowed['script']}; connect-src 'self'; img-src data:; "
            "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )

    def _hashes(self, tag: str) -> str:
        bodies = re.findall(rf"<{tag}>(.*?)</{tag}>", self.text, flags=re.DOTALL)
        return " ".join(
            f"'sha256-{base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()}'" for body in bodies
        )

    async def __call__(self) -> HTMLResponse:
        return HTMLResponse(
            self.text, headers={"Content-Security-Policy": self.policy, "Cache-Control": "no-cache"}
        )


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    return JSONResponse(error.body, error.status, error.headers)


async def _wrong_body(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError | ValidationError)
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"] if part != "body")
    message = (
        "the body is not JSON"
        if first["type"] == "json_invalid"
        else f"{where}: {first['msg']}"
        if where
        else first["msg"]
    )
    return JSONResponse(Refusal(422, message).body, 422)


async def _http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse(
        Refusal(error.status_code, HTTP_TEXTS.get(error.status_code, "refused")).body,
        error.status_code,
        error.headers,
    )


def create_app(service: Service, keys: KeyRing, folders: Folders) -> FastAPI:
    """The application of a service whose adapters `folders` keeps in step with the disk."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        watching = asyncio.create_task(folders.watch())
        yield
        watching.cancel()
        await service.stop()

    app = FastAPI(
        title="textlora", version=version("textlora"), lifespan=lifespan, docs_url=None, redoc_url=None,
        summary="Thousands of text classifiers on one frozen encoder.", telemetry={"tracing": False, "metrics": False, "logs": False},
        exception_handlers={Refusal: _refused, RequestValidationError: _wrong_body, ValidationError: _wrong_body, HTTPException: _http_error},
    )  # fmt: skip
    app.state.service, app.state.keys, app.state.folders = service, keys, folders
    app.include_router(quick)
    app.include_router(router)
    if service.settings.load_from:
        app.include_router(manage)
    app.add_api_route("/", Page("page.html"), include_in_schema=False)
    app.add_api_route("/docs", Page("docs.html"), include_in_schema=False)
    if service.settings.cors_origins:
        allowed = {"allow_methods": ["GET", "POST"], "allow_headers": ["Authorization", "Content-Type"]}
        app.add_middleware(CORSMiddleware, allow_origins=list(service.settings.cors_origins), **allowed)
    settings = service.settings
    app.add_middleware(
        Outer, keys=keys, metrics=service.metrics, check_room=service.check_room, max_body=settings.max_body_bytes,
        seconds=settings.deadline_seconds,
    )  # fmt: skip
    return app
