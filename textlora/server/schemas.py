"""Bodies of requests and answers, as text-embeddings-inference, huggingface_hub, vLLM and SGLang have them."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


def _whole(text: str) -> str:
    """JSON can spell half a surrogate pair, which is no character and breaks a tokenizer."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("not a Unicode string") from None
    return text


Text = Annotated[str, AfterValidator(_whole)]
TextOrPair = Annotated[
    list[Text], Field(min_length=1, max_length=2, description="One text, or a pair of two.")
]
Names = Annotated[list[Text], Field(min_length=1, max_length=64)]


class _Request(BaseModel):
    model_config = ConfigDict(strict=True, protected_namespaces=())


class Parameters(_Request):
    """What huggingface_hub's InferenceClient sends beside the text."""

    adapter_id: Text | Names | None = Field(None, description="The adapter, as `model`.")
    top_k: int | None = Field(None, ge=1, le=2**31, description="Only the best so many labels.")
    function_to_apply: Literal["sigmoid", "softmax", "none"] | None = Field(
        None, description="Default: what the adapter was trained with."
    )


class PredictRequest(_Request):
    """A text, a pair as a list of two strings, or a batch as a list of such lists."""

    inputs: Text | TextOrPair | Annotated[list[TextOrPair], Field(min_length=1)] = Field(
        description="A text; a list of one text, or of two, which are a pair; or a batch: a list of such lists.",
        examples=["A warm, funny film."],
    )
    model: Text | Names | None = Field(None, description="Adapter; several names run each on every text.")
    parameters: Parameters | None = Field(None, description="As huggingface_hub sends them.")
    raw_scores: bool = Field(False, description="Logits in place of probabilities.")
    truncate: bool | None = Field(
        None, description="false refuses a text longer than the adapter reads; else it is cut as in training."
    )
    truncation_direction: Literal["left", "right", "Left", "Right"] | None = Field(
        None, description="Accepted; each adapter cuts as in training."
    )


class LabelScore(BaseModel):
    """A label's score. `chosen` stands with multi-label adapters: whether the score reaches the label's
    threshold."""

    label: str
    score: float
    chosen: bool | None = None


Scores = list[LabelScore]
ByAdapter = dict[str, Scores]
PredictAnswer = Scores | list[Scores] | ByAdapter | list[ByAdapter]


class ClassifyRequest(_Request):
    """vLLM's and SGLang's request; fields that mean nothing here are accepted."""

    input: Text | Annotated[list[Text], Field(min_length=1)] = Field(
        description="A text or several.", examples=["A warm, funny film."]
    )
    model: Text | Names | None = Field(None, description="Adapter; several names run each on every text.")
    use_activation: bool | None = Field(None, description="false: logits in place of probabilities.")


class Classified(BaseModel):
    """One text by one adapter; `probs` in class order, `labels` those chosen (multi-label), `model` where
    several were asked."""

    index: int
    label: str
    probs: list[float]
    num_classes: int
    labels: list[str] | None = None
    model: str | None = None


class Usage(BaseModel):
    prompt_tokens: int
    total_tokens: int
    completion_tokens: int = 0
    prompt_tokens_details: None = None


class ClassifyAnswer(BaseModel):
    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[Classified]
    usage: Usage


class ModelCard(BaseModel):
    """An adapter. `root` is its name: where it lies is nobody's business."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["textlora"] = "textlora"
    root: str
    parent: str
    problem_type: str
    pairs: bool
    num_labels: int


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class ModelDetails(ModelCard):
    labels: list[str]
    max_length: int


class LoadRequest(_Request):
    lora_name: Text
    lora_path: Text = Field(
        description="A folder inside one of --load-from; relative ones are looked for there."
    )
    load_inplace: bool = Field(False, description="Replace the adapter of that name.")


class UnloadRequest(_Request):
    lora_name: Text
    lora_int_id: int | None = None


class Status(BaseModel):
    status: Literal["ok", "ready", "not ready"]


class Info(BaseModel):
    model_config = ConfigDict(protected_namespaces=())
    model_id: str
    model_sha: str
    model_dtype: str
    model_type: dict[str, Any]
    max_concurrent_requests: int
    max_input_length: int
    max_batch_tokens: int
    max_client_batch_size: int
    max_text_chars: int
    auto_truncate: bool
    tokenization_workers: int
    version: str
    executor: str
    adapters: int
    default_adapter: str | None
    can_load: bool


class ErrorBody(BaseModel):
    """The one shape of every error."""

    error: str
    error_type: str
