"""What featnorm found, as pages that need no network, and as tables for a terminal or a document.

The modules are imported by those who use them: matplotlib takes half a second, and not all of them need torch.
"""
