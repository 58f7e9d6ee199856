"""A comparison of detectors as a page, and as a table for a terminal or a document."""

from featnorm.report.page import write_page
from featnorm.report.tables import markdown_page, table_rows

__all__ = ["markdown_page", "table_rows", "write_page"]
