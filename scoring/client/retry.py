"""When to try again, and what a broken call means."""

from __future__ import annotations

import random

import grpc

from rollout_wal.errors import RolloutWalError

from ..errors import (
    BadRequest,
    DeadlinePassed,
    MessageTooLarge,
    Overloaded,
    ScoreProvenanceMismatch,
    TeacherFailed,
    Unreachable,
    problem,
)
from ..v1 import scoring_pb2 as pb
from .options import ClientOptions

#: What a server answers about an item that stays as it is wherever it is sent.
FINAL: dict[int, type[RolloutWalError]] = {
    pb.ERROR_CODE_BAD_REQUEST: BadRequest,
    pb.ERROR_CODE_DEADLINE_PASSED: DeadlinePassed,
}
#: What a server answers about an item that another server may score.
ELSEWHERE: dict[int, type[RolloutWalError]] = {
    pb.ERROR_CODE_PROVENANCE_MISMATCH: ScoreProvenanceMismatch,
    pb.ERROR_CODE_TEACHER_FAILED: TeacherFailed,
    pb.ERROR_CODE_TOO_LARGE: MessageTooLarge,
}
_NO_USE = (
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.INVALID_ARGUMENT,
)
#: What gRPC says of a certificate that is expired, of another name, or signed by somebody else.
_TLS = ("certificate_verify_failed", "certificate verify failed", "peer name", "hostname verification")


def delay(options: ClientOptions, failures: int) -> float:
    """Seconds to wait after so many failures in a row (1 or more): doubled each time, half of it random.

    Without the random half, all clients of a server that died would come back in the same instant, again and again.
    """
    whole = min(options.backoff_max_s, options.backoff_s * 2.0 ** min(failures - 1, 30))
    return whole * random.uniform(0.5, 1.0)


def is_refusal(error: grpc.aio.AioRpcError) -> bool:
    """The server does not want this client, and will not want it later either."""
    text = (error.details() or "").lower()
    return error.code() in _NO_USE or any(part in text for part in _TLS)


def pushback_s(error: grpc.aio.AioRpcError) -> float:
    """How long the server asks to be left alone, if it says so in the trailing metadata of a failed call."""
    for key, value in error.trailing_metadata() or ():
        if key == "grpc-retry-pushback-ms":
            try:
                return max(0.0, int(value) / 1000)
            except ValueError:
                return 0.0
    return 0.0


def of_status(target: str, error: Exception | None) -> RolloutWalError:
    """What a broken stream means for the items that it did not answer."""
    if not isinstance(error, grpc.aio.AioRpcError):
        text = f"{target} ended the stream without an answer"
    else:
        details = error.details() or ""
        text = f"{target}: {error.code().name} {details}"
        # Too large has the same status code as overload; it is told apart by what gRPC says about it.
        if error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED:
            if "larger than max" in details:
                return MessageTooLarge(
                    problem(text, consequence="The item was not scored", remedy="Raise the limit of the smaller end")
                )
            return Overloaded(
                problem(text, consequence="The item was not scored", remedy="Come back later"), pushback_s(error)
            )
        if error.code() == grpc.StatusCode.DEADLINE_EXCEEDED:
            return DeadlinePassed(
                problem(text, consequence="The item was not scored", remedy="Allow more time, or send less at once")
            )
        if is_refusal(error):
            return BadRequest(
                problem(
                    text,
                    consequence="The item was not scored",
                    remedy="Correct the token, the certificates or the protocol version",
                )
            )
    return Unreachable(
        problem(text, consequence="The item was not scored", remedy="See that a server with this teacher is running")
    )
