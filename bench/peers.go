package main

import "context"

func (b *benchmark) comparePeers(context.Context) error { return nil }
