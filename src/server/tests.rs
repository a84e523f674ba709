//! The server with real sockets, and clients in threads.
