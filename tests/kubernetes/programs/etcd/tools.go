//go:build tools

// Package tools names the program that this module pins: the store of a Kubernetes cluster.
package tools

import _ "go.etcd.io/etcd/server/v3"
