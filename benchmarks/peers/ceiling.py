"""What the client itself can do: the least that can answer an upload. `python ceiling.py PORT`"""

import asyncio
import sys

import uvloop

ANSWER = b'HTTP/1.1 200 OK\r\ncontent-length: 19\r\n\r\n{"class":"nothing"}'


class Answer(asyncio.Protocol):
    """A constant, when the form's last boundary is there."""

    def connection_made(self, transport):
        """Begin."""
        self.transport, self.end = transport, b""

    def data_received(self, data):
        """Answer."""
        self.end = (self.end + data)[-10:]
        if self.end.endswith(b"--\r\n"):
            self.end = b""
            self.transport.write(ANSWER)


async def main():
    """Until it is ended."""
    server = await asyncio.get_running_loop().create_server(Answer, "127.0.0.1", int(sys.argv[1]))
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main())
