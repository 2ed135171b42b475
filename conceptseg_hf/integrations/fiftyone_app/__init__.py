"""FiftyOne's App on the loopback interface: command, App server and MongoDB. FiftyOne is imported only when needed."""
