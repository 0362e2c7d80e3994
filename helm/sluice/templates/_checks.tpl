{{/* Values that the schema cannot compare with one another; each failure names value and remedy. */}}
{{- define "sluice.checks" -}}
{{- include "sluice.checkScaling" . -}}
{{- include "sluice.checkDevices" . -}}
{{- include "sluice.checkMemory" . -}}
{{- include "sluice.checkReferences" . -}}
{{- end -}}

{{- define "sluice.checkScaling" -}}
{{- with .Values.autoscaling -}}
{{- if and .enabled (gt (int64 .minReplicas) (int64 .maxReplicas)) -}}
{{- fail (printf "autoscaling.minReplicas=%d, autoscaling.maxReplicas=%d: the least must not exceed the most" (int64 .minReplicas) (int64 .maxReplicas)) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "sluice.checkDevices" -}}
{{- $tp := int64 .Values.parallel.tp -}}
{{- $world := include "sluice.worldSize" . | int64 -}}
{{- $gpus := int64 .Values.worker.gpusPerPod -}}
{{- if eq .Values.model.device "cuda" -}}
{{- if eq $gpus 0 -}}
{{- fail "worker.gpusPerPod=0 with model.device=cuda: every rank needs a GPU, give the pods some" -}}
{{- end -}}
{{- $packs := eq (mod $gpus $world) 0 -}}
{{- $spreads := and (eq (mod $world $gpus) 0) (eq (mod $gpus $tp) 0) -}}
{{- if not (or $packs $spreads) -}}
{{- fail (printf "worker.gpusPerPod=%d, parallel.tp x parallel.pp = %d: take a multiple of %d, or a divisor of it that is a multiple of tp=%d" $gpus $world $world $tp) -}}
{{- end -}}
{{- else if gt $gpus 0 -}}
{{- fail (printf "worker.gpusPerPod=%d with model.device=cpu: the GPUs would idle, set model.device=cuda or 0" $gpus) -}}
{{- end -}}
{{- $ranks := include "sluice.ranksPerPod" . | int64 -}}
{{- $need := add (mul $ranks (int64 .Values.parallel.cpusPerRank)) (max 1 (div $ranks $world)) -}}
{{- if lt (int64 .Values.worker.cpu) $need -}}
{{- fail (printf "worker.cpu=%d, needed %d: %d ranks x parallel.cpusPerRank and 1 for each group's leader" (int64 .Values.worker.cpu) $need $ranks) -}}
{{- end -}}
{{- end -}}

{{- define "sluice.checkMemory" -}}
{{- $root := . -}}
{{- range $kind := list "head" "gateway" "worker" -}}
{{- $node := index $root.Values $kind -}}
{{- $shared := include "sluice.bytes" $node.sharedMemory | int64 -}}
{{- if ge $shared (include "sluice.bytes" $node.memory | int64) -}}
{{- fail (printf "%s.sharedMemory=%s, %s.memory=%s: /dev/shm is counted against the pod's memory, leave room for the processes" $kind $node.sharedMemory $kind $node.memory) -}}
{{- end -}}
{{- if lt $shared (include "sluice.bytes" $root.Values.ray.objectStoreMemory | int64) -}}
{{- fail (printf "%s.sharedMemory=%s, ray.objectStoreMemory=%s: Ray's objects live in /dev/shm, make it larger" $kind $node.sharedMemory $root.Values.ray.objectStoreMemory) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "sluice.checkReferences" -}}
{{- with .Values.redis -}}
{{- if and .url .existingSecret -}}
{{- fail "redis.url and redis.existingSecret are both set: keep one of them" -}}
{{- end -}}
{{- if and .kvKey (not .existingSecret) -}}
{{- fail (printf "redis.kvKey=%s without redis.existingSecret: the chart's own Secret has one URL only" .kvKey) -}}
{{- end -}}
{{- if and .kvKey (hasKey (default dict $.Values.config.store) "kv_url") -}}
{{- fail "redis.kvKey and config.store.kv_url are both set: keep one of them" -}}
{{- end -}}
{{- end -}}
{{- with .Values.ray.gcs -}}
{{- if and .passwordSecret (not .redisAddress) -}}
{{- fail (printf "ray.gcs.passwordSecret=%s without ray.gcs.redisAddress: name the Redis that asks for it" .passwordSecret) -}}
{{- end -}}
{{- end -}}
{{- with .Values.auth -}}
{{- if and .jwtKey (not .existingSecret) -}}
{{- fail (printf "auth.jwtKey=%s without auth.existingSecret: name the Secret that holds it and the tenants file" .jwtKey) -}}
{{- end -}}
{{- end -}}
{{- with .Values.gateway -}}
{{- if eq (int64 .metricsPort) (int64 .port) -}}
{{- fail (printf "gateway.metricsPort=%d is gateway.port too: choose another" (int64 .metricsPort)) -}}
{{- end -}}
{{- end -}}
{{- with .Values.model -}}
{{- if and .pvc.claimName (not (hasPrefix (printf "%s/" (trimSuffix "/" .pvc.mountPath)) (printf "%s/" .path))) -}}
{{- fail (printf "model.path=%s is outside of model.pvc.mountPath=%s: name a folder in the claim" .path .pvc.mountPath) -}}
{{- end -}}
{{- end -}}
{{- with .Values.gateway -}}
{{- if and .tls.clientCa (not .tls.existingSecret) -}}
{{- fail "gateway.tls.clientCa=true without gateway.tls.existingSecret: client certificates need TLS" -}}
{{- end -}}
{{- if and .service.headless (ne .service.type "ClusterIP") -}}
{{- fail (printf "gateway.service.headless=true with gateway.service.type=%s: only a ClusterIP Service can be headless" .service.type) -}}
{{- end -}}
{{- end -}}
{{- end -}}
