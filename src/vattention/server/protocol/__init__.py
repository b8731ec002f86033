"""What requests and answers look like, one module an endpoint family. Strict: wrong types are refused."""
