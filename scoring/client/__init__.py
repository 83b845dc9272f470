"""Clients: items in, verified scores out, over one or several servers.

options        how to reach them, how long to try
servers        one server: its channel, its teachers, its health
retry          delays, and what a broken call means
choice         which server an item may go to
run            one call of `score`: dispatch, verification, sending again
heads          LM heads of teachers, fetched once
asynchronous, synchronous (on the loop of background)

Every result is held against its item before it is handed out. An item that a server did not answer (it died, drained
or was overloaded) is sent again, after a delay with jitter, to any server that has the same checkpoint.
"""

from .asynchronous import AsyncScoringClient
from .heads import TeacherHead
from .options import ClientOptions
from .synchronous import ScoringClient

__all__ = ["AsyncScoringClient", "ClientOptions", "ScoringClient", "TeacherHead"]
