"""One run, several or a sweep as a static web page."""
