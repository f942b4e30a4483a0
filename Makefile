# Two commands are all a newcomer needs: `make demo` and `make test`.
export CGO_CFLAGS ?= -O2 -g -Wno-deprecated-declarations
SHELL := bash
BIN := bin

.PHONY: demo test check lint generate build setup race bench bench-rollouts chaos fuzz clean
build: ## build the orrery binary
	go build -o $(BIN)/orrery ./cmd/orrery

setup: ## fetch what Orrery runs on
	deploy/setup.sh run

demo: setup build ## set up, and run the four stories on real data; KEEP=1 leaves it running
	go build -o $(BIN)/flights-trainer ./examples/flights/trainer
	go build -o $(BIN)/demo ./examples/flights/demo
	$(BIN)/demo $(if $(KEEP),-keep)

test: ## set up, and run every test, the demo last
	deploy/setup.sh test
	go test -shuffle=on -timeout 15m ./...
	CGO_ENABLED=0 go build -o $(BIN)/orrery-control ./cmd/orrery
	$(MAKE) demo

race: ## the tests again, under the race detector
	deploy/setup.sh test
	go test -race -shuffle=on -timeout 20m ./registry/... ./engine/... ./worker/... ./api/... ./monitor/... ./activities/... ./workflows/...

bench: setup build ## measure against raw ONNX Runtime and other servers (about 15 minutes); see docs/benchmarks.md
	deploy/setup.sh bench
	go build -o $(BIN)/bench ./bench
	$(BIN)/bench

CHAOS ?= 10m
chaos: ## kill every part at random under load, and check that nothing was lost, doubled or untrue
	deploy/setup.sh test
	ORRERY_CHAOS=$(CHAOS) go test ./cmd/orrery -run '^TestChaos$$' -v -timeout 0

bench-rollouts: build ## measure the control plane, with Temporal on PostgreSQL
	deploy/setup.sh cluster
	go build -o $(BIN)/rollouts ./bench/rollouts
	$(BIN)/rollouts

FUZZTIME ?= 60s
fuzz: ## look for inputs that break the protocol's decoders
	for f in FuzzREST FuzzGRPC FuzzBytes FuzzJSONNumbers; do go test ./api/proto/oip -run '^$$' -fuzz "^$$f$$" -fuzztime $(FUZZTIME) || exit 1; done

lint: ## linters, arrows, determinism of workflows
	deploy/setup.sh lint
	.tools/bin/golangci-lint run ./...
	.tools/bin/workflowcheck ./workflows/...
	.tools/bin/buf lint

generate: ## make generated code again
	deploy/setup.sh lint
	.tools/bin/buf generate
	.tools/bin/oapi-codegen -config api/oapi-server.yaml api/openapi.yaml
	.tools/bin/oapi-codegen -config api/oapi-client.yaml api/openapi.yaml

check: lint generate ## everything that must hold before a change lands
	git diff --exit-code
	go mod tidy -diff
	$(MAKE) race test

clean:
	rm -rf $(BIN) .orrery .orrery-demo
