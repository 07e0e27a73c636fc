"""uvicorn's fast HTTP parser with a bound on what it keeps: httptools holds a URL and headers of any length."""

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol


def bounded(most: int) -> type[HttpToolsProtocol]:
    """A protocol that answers 400, and closes, where a request's line and headers (trailers too) have more
    than `most` bytes.

    What the parser gives is counted as it comes; what it holds itself, the beginning of a header, by the
    bytes fed without hearing of it.
    """

    class Bounded(HttpToolsProtocol):
        kept = unheard = begun = 0
        inside = in_head = heard = False

        def data_received(self, data: bytes) -> None:
            first, self.begun, self.heard = not self.inside, 0, False
            super().data_received(data)
            if first and self.begun == 1 and self.in_head:
                self.unheard = len(data)
            else:
                self.unheard = 0 if self.heard else self.unheard + len(data)
            if self.unheard > most and not self.transport.is_closing():
                self.send_400_response("Invalid HTTP request received.")

        def on_message_begin(self) -> None:
            self.inside = self.in_head = self.heard = True
            self.begun, self.kept = self.begun + 1, 0
            super().on_message_begin()

        def on_url(self, url: bytes) -> None:
            self._keep(len(url))
            super().on_url(url)

        def on_header(self, name: bytes, value: bytes) -> None:
            self._keep(len(name) + len(value) + 4)
            super().on_header(name, value)

        def on_headers_complete(self) -> None:
            self.in_head = False
            super().on_headers_complete()

        def on_body(self, body: bytes) -> None:
            self.heard = True
            super().on_body(body)

        def on_message_complete(self) -> None:
            self.inside = False
            super().on_message_complete()

        def _keep(self, size: int) -> None:
            self.heard = True
            self.kept += size
            if self.kept > most:
                raise ValueError(
                    "too long"
                )  # the parser stops, and the request is answered as one that cannot be read

    return Bounded
