from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Dtype(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DTYPE_UNSPECIFIED: _ClassVar[Dtype]
    DTYPE_INT32: _ClassVar[Dtype]
    DTYPE_INT64: _ClassVar[Dtype]
    DTYPE_FLOAT32: _ClassVar[Dtype]
    DTYPE_BFLOAT16: _ClassVar[Dtype]
    DTYPE_UINT8: _ClassVar[Dtype]

class ArrayKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ARRAY_KIND_UNSPECIFIED: _ClassVar[ArrayKind]
    ARRAY_KIND_TOKEN_IDS: _ClassVar[ArrayKind]
    ARRAY_KIND_TEACHER_PREFIX_IDS: _ClassVar[ArrayKind]
    ARRAY_KIND_CANDIDATE_IDS: _ClassVar[ArrayKind]
    ARRAY_KIND_LOGPROBS: _ClassVar[ArrayKind]
    ARRAY_KIND_TOP_IDS: _ClassVar[ArrayKind]
    ARRAY_KIND_TOP_LOGPROBS: _ClassVar[ArrayKind]
    ARRAY_KIND_TAIL_MASS: _ClassVar[ArrayKind]
    ARRAY_KIND_ENTROPY: _ClassVar[ArrayKind]
    ARRAY_KIND_CANDIDATE_LOGPROBS: _ClassVar[ArrayKind]
    ARRAY_KIND_HIDDEN_STATES: _ClassVar[ArrayKind]
    ARRAY_KIND_VALID: _ClassVar[ArrayKind]
    ARRAY_KIND_HEAD_WEIGHT: _ClassVar[ArrayKind]

class ErrorCode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ERROR_CODE_UNSPECIFIED: _ClassVar[ErrorCode]
    ERROR_CODE_BAD_REQUEST: _ClassVar[ErrorCode]
    ERROR_CODE_PROVENANCE_MISMATCH: _ClassVar[ErrorCode]
    ERROR_CODE_OVERLOADED: _ClassVar[ErrorCode]
    ERROR_CODE_DEADLINE_PASSED: _ClassVar[ErrorCode]
    ERROR_CODE_TEACHER_FAILED: _ClassVar[ErrorCode]
    ERROR_CODE_DRAINING: _ClassVar[ErrorCode]
    ERROR_CODE_TOO_LARGE: _ClassVar[ErrorCode]
DTYPE_UNSPECIFIED: Dtype
DTYPE_INT32: Dtype
DTYPE_INT64: Dtype
DTYPE_FLOAT32: Dtype
DTYPE_BFLOAT16: Dtype
DTYPE_UINT8: Dtype
ARRAY_KIND_UNSPECIFIED: ArrayKind
ARRAY_KIND_TOKEN_IDS: ArrayKind
ARRAY_KIND_TEACHER_PREFIX_IDS: ArrayKind
ARRAY_KIND_CANDIDATE_IDS: ArrayKind
ARRAY_KIND_LOGPROBS: ArrayKind
ARRAY_KIND_TOP_IDS: ArrayKind
ARRAY_KIND_TOP_LOGPROBS: ArrayKind
ARRAY_KIND_TAIL_MASS: ArrayKind
ARRAY_KIND_ENTROPY: ArrayKind
ARRAY_KIND_CANDIDATE_LOGPROBS: ArrayKind
ARRAY_KIND_HIDDEN_STATES: ArrayKind
ARRAY_KIND_VALID: ArrayKind
ARRAY_KIND_HEAD_WEIGHT: ArrayKind
ERROR_CODE_UNSPECIFIED: ErrorCode
ERROR_CODE_BAD_REQUEST: ErrorCode
ERROR_CODE_PROVENANCE_MISMATCH: ErrorCode
ERROR_CODE_OVERLOADED: ErrorCode
ERROR_CODE_DEADLINE_PASSED: ErrorCode
ERROR_CODE_TEACHER_FAILED: ErrorCode
ERROR_CODE_DRAINING: ErrorCode
ERROR_CODE_TOO_LARGE: ErrorCode

class Provenance(_message.Message):
    __slots__ = ("teacher", "checkpoint_digest", "tokenizer_digest", "chat_template_digest", "precision")
    TEACHER_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_DIGEST_FIELD_NUMBER: _ClassVar[int]
    CHAT_TEMPLATE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    PRECISION_FIELD_NUMBER: _ClassVar[int]
    teacher: str
    checkpoint_digest: str
    tokenizer_digest: str
    chat_template_digest: str
    precision: str
    def __init__(self, teacher: _Optional[str] = ..., checkpoint_digest: _Optional[str] = ..., tokenizer_digest: _Optional[str] = ..., chat_template_digest: _Optional[str] = ..., precision: _Optional[str] = ...) -> None: ...

class Teacher(_message.Message):
    __slots__ = ("provenance", "domains", "vocabulary", "max_context", "hidden_size", "resident", "failure")
    PROVENANCE_FIELD_NUMBER: _ClassVar[int]
    DOMAINS_FIELD_NUMBER: _ClassVar[int]
    VOCABULARY_FIELD_NUMBER: _ClassVar[int]
    MAX_CONTEXT_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_SIZE_FIELD_NUMBER: _ClassVar[int]
    RESIDENT_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    provenance: Provenance
    domains: _containers.RepeatedScalarFieldContainer[str]
    vocabulary: int
    max_context: int
    hidden_size: int
    resident: bool
    failure: str
    def __init__(self, provenance: _Optional[_Union[Provenance, _Mapping]] = ..., domains: _Optional[_Iterable[str]] = ..., vocabulary: _Optional[int] = ..., max_context: _Optional[int] = ..., hidden_size: _Optional[int] = ..., resident: _Optional[bool] = ..., failure: _Optional[str] = ...) -> None: ...

class ListTeachersRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListTeachersResponse(_message.Message):
    __slots__ = ("teachers", "max_item_tokens", "max_queued_tokens")
    TEACHERS_FIELD_NUMBER: _ClassVar[int]
    MAX_ITEM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_QUEUED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    teachers: _containers.RepeatedCompositeFieldContainer[Teacher]
    max_item_tokens: int
    max_queued_tokens: int
    def __init__(self, teachers: _Optional[_Iterable[_Union[Teacher, _Mapping]]] = ..., max_item_tokens: _Optional[int] = ..., max_queued_tokens: _Optional[int] = ...) -> None: ...

class ArrayChunk(_message.Message):
    __slots__ = ("kind", "dtype", "shape", "offsets", "byte_offset", "data")
    KIND_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    OFFSETS_FIELD_NUMBER: _ClassVar[int]
    BYTE_OFFSET_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    kind: ArrayKind
    dtype: Dtype
    shape: _containers.RepeatedScalarFieldContainer[int]
    offsets: bytes
    byte_offset: int
    data: bytes
    def __init__(self, kind: _Optional[_Union[ArrayKind, str]] = ..., dtype: _Optional[_Union[Dtype, str]] = ..., shape: _Optional[_Iterable[int]] = ..., offsets: _Optional[bytes] = ..., byte_offset: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class Wanted(_message.Message):
    __slots__ = ("logprobs", "top_k", "candidates", "entropy", "hidden_states")
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    CANDIDATES_FIELD_NUMBER: _ClassVar[int]
    ENTROPY_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_STATES_FIELD_NUMBER: _ClassVar[int]
    logprobs: bool
    top_k: int
    candidates: bool
    entropy: bool
    hidden_states: bool
    def __init__(self, logprobs: _Optional[bool] = ..., top_k: _Optional[int] = ..., candidates: _Optional[bool] = ..., entropy: _Optional[bool] = ..., hidden_states: _Optional[bool] = ...) -> None: ...

class ScoreItem(_message.Message):
    __slots__ = ("teacher", "domain", "span_start", "span_end", "temperature", "wanted", "expected", "tokens_crc32c", "has_teacher_prefix", "deadline_ms")
    TEACHER_FIELD_NUMBER: _ClassVar[int]
    DOMAIN_FIELD_NUMBER: _ClassVar[int]
    SPAN_START_FIELD_NUMBER: _ClassVar[int]
    SPAN_END_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    WANTED_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_FIELD_NUMBER: _ClassVar[int]
    TOKENS_CRC32C_FIELD_NUMBER: _ClassVar[int]
    HAS_TEACHER_PREFIX_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_MS_FIELD_NUMBER: _ClassVar[int]
    teacher: str
    domain: str
    span_start: int
    span_end: int
    temperature: float
    wanted: Wanted
    expected: Provenance
    tokens_crc32c: int
    has_teacher_prefix: bool
    deadline_ms: int
    def __init__(self, teacher: _Optional[str] = ..., domain: _Optional[str] = ..., span_start: _Optional[int] = ..., span_end: _Optional[int] = ..., temperature: _Optional[float] = ..., wanted: _Optional[_Union[Wanted, _Mapping]] = ..., expected: _Optional[_Union[Provenance, _Mapping]] = ..., tokens_crc32c: _Optional[int] = ..., has_teacher_prefix: _Optional[bool] = ..., deadline_ms: _Optional[int] = ...) -> None: ...

class ScoreRequest(_message.Message):
    __slots__ = ("item_id", "item", "chunks", "last")
    ITEM_ID_FIELD_NUMBER: _ClassVar[int]
    ITEM_FIELD_NUMBER: _ClassVar[int]
    CHUNKS_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    item_id: str
    item: ScoreItem
    chunks: _containers.RepeatedCompositeFieldContainer[ArrayChunk]
    last: bool
    def __init__(self, item_id: _Optional[str] = ..., item: _Optional[_Union[ScoreItem, _Mapping]] = ..., chunks: _Optional[_Iterable[_Union[ArrayChunk, _Mapping]]] = ..., last: _Optional[bool] = ...) -> None: ...

class ItemError(_message.Message):
    __slots__ = ("code", "message", "retry_after_seconds")
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_SECONDS_FIELD_NUMBER: _ClassVar[int]
    code: ErrorCode
    message: str
    retry_after_seconds: float
    def __init__(self, code: _Optional[_Union[ErrorCode, str]] = ..., message: _Optional[str] = ..., retry_after_seconds: _Optional[float] = ...) -> None: ...

class ScoreResult(_message.Message):
    __slots__ = ("provenance", "tokens_crc32c", "scored_crc32c", "span_start", "span_end", "request_key", "arrays_crc32c", "from_cache")
    PROVENANCE_FIELD_NUMBER: _ClassVar[int]
    TOKENS_CRC32C_FIELD_NUMBER: _ClassVar[int]
    SCORED_CRC32C_FIELD_NUMBER: _ClassVar[int]
    SPAN_START_FIELD_NUMBER: _ClassVar[int]
    SPAN_END_FIELD_NUMBER: _ClassVar[int]
    REQUEST_KEY_FIELD_NUMBER: _ClassVar[int]
    ARRAYS_CRC32C_FIELD_NUMBER: _ClassVar[int]
    FROM_CACHE_FIELD_NUMBER: _ClassVar[int]
    provenance: Provenance
    tokens_crc32c: int
    scored_crc32c: int
    span_start: int
    span_end: int
    request_key: str
    arrays_crc32c: int
    from_cache: bool
    def __init__(self, provenance: _Optional[_Union[Provenance, _Mapping]] = ..., tokens_crc32c: _Optional[int] = ..., scored_crc32c: _Optional[int] = ..., span_start: _Optional[int] = ..., span_end: _Optional[int] = ..., request_key: _Optional[str] = ..., arrays_crc32c: _Optional[int] = ..., from_cache: _Optional[bool] = ...) -> None: ...

class ScoreResponse(_message.Message):
    __slots__ = ("item_id", "result", "error", "chunks", "last")
    ITEM_ID_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    CHUNKS_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    item_id: str
    result: ScoreResult
    error: ItemError
    chunks: _containers.RepeatedCompositeFieldContainer[ArrayChunk]
    last: bool
    def __init__(self, item_id: _Optional[str] = ..., result: _Optional[_Union[ScoreResult, _Mapping]] = ..., error: _Optional[_Union[ItemError, _Mapping]] = ..., chunks: _Optional[_Iterable[_Union[ArrayChunk, _Mapping]]] = ..., last: _Optional[bool] = ...) -> None: ...

class GetTeacherHeadRequest(_message.Message):
    __slots__ = ("teacher", "expected")
    TEACHER_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_FIELD_NUMBER: _ClassVar[int]
    teacher: str
    expected: Provenance
    def __init__(self, teacher: _Optional[str] = ..., expected: _Optional[_Union[Provenance, _Mapping]] = ...) -> None: ...

class GetTeacherHeadResponse(_message.Message):
    __slots__ = ("provenance", "chunks", "last", "arrays_crc32c")
    PROVENANCE_FIELD_NUMBER: _ClassVar[int]
    CHUNKS_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    ARRAYS_CRC32C_FIELD_NUMBER: _ClassVar[int]
    provenance: Provenance
    chunks: _containers.RepeatedCompositeFieldContainer[ArrayChunk]
    last: bool
    arrays_crc32c: int
    def __init__(self, provenance: _Optional[_Union[Provenance, _Mapping]] = ..., chunks: _Optional[_Iterable[_Union[ArrayChunk, _Mapping]]] = ..., last: _Optional[bool] = ..., arrays_crc32c: _Optional[int] = ...) -> None: ...
