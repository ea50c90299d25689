"""Running a benchmark, counting, and reporting: `trainer.predict` to mIoU."""
