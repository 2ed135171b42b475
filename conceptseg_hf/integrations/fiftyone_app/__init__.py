"""FiftyOne's App on loopback: the command, the App server and MongoDB. Nothing here imports FiftyOne by itself."""
