//go:build tools

// Package tools names the programs that this module pins: Kubernetes' own tests, what runs them, and what one of them runs in pods.
package tools

import (
	_ "github.com/onsi/ginkgo/v2/ginkgo"
	_ "k8s.io/kubernetes/test/e2e"
	_ "k8s.io/sample-apiserver"
)
