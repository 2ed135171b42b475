"""Segmentation of many images as one job that streams, resumes and runs on one device or on a Ray cluster."""

from .job import BatchJob
from .run import BatchReport, run_batch
from .sources import open_images
from .worker import BatchResult

__all__ = ["BatchJob", "BatchReport", "BatchResult", "open_images", "run_batch"]
