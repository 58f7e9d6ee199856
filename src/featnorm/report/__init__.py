"""What featnorm found, as pages that need no network, and as tables for a terminal or a document."""

from featnorm.report.comparison import write_page
from featnorm.report.tables import markdown_page, table_rows

__all__ = ["markdown_page", "table_rows", "write_page"]
