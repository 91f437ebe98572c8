"""Script: what a user's own training script imports, by way of the package itself."""

from distbelief.solo import Solo
from distbelief.workers import session
from distbelief.workers.downpour import Downpour
from distbelief.workers.loader import DataLoader
from distbelief.workers.session import worker

__all__ = ["DataLoader", "Downpour", "worker"]

session.set_default(Solo)
