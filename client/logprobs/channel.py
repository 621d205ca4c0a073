"""How the clients' channels behave: balancing, retries, message sizes. Knows nothing of calls."""

from __future__ import annotations

import json

from logprobs.v1 import logprobs_pb2 as pb

__all__ = ["CHANNEL_OPTIONS"]

_SERVICE = pb.DESCRIPTOR.services_by_name["LogprobsService"].full_name
_SERVICE_CONFIG = {
    "loadBalancingConfig": [{"round_robin": {}}],
    "healthCheckConfig": {"serviceName": _SERVICE},
    "methodConfig": [
        {
            "name": [{"service": _SERVICE}],
            "retryPolicy": {
                "maxAttempts": 3,
                "initialBackoff": "0.05s",
                "maxBackoff": "1s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ],
}
"""Calls go round the healthy ones of a target's addresses. gRPC itself tries again what is UNAVAILABLE, as long as
no response has begun: every method only reads, and a stream is never replayed half-way."""

CHANNEL_OPTIONS = (
    ("grpc.service_config", json.dumps(_SERVICE_CONFIG)),
    # The server tells and keeps its own limit on messages; a second one here could only fail what it was allowed to
    # send, once an operator raises it.
    ("grpc.max_receive_message_length", -1),
)
