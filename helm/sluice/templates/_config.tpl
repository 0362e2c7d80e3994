{{/* The configuration tree of cluster/config.py: the user's knobs below those that the chart sets.
Secrets never enter it: env:SLUICE_STORE_URL is read from the environment of each process, the tenants
from a file. */}}
{{- define "sluice.config" -}}
{{- $drain := .Values.drain.timeoutSeconds -}}
{{- $replica := dict "host" "0.0.0.0" "start_timeout_s" .Values.model.startTimeoutSeconds "drain_timeout_s" $drain -}}
{{- if .Values.autoscaling.enabled -}}
{{- $_ := set $replica "autoscaling" (dict
  "min_replicas" .Values.autoscaling.minReplicas
  "max_replicas" .Values.autoscaling.maxReplicas
  "target_load" .Values.autoscaling.targetLoad
  "upscale_delay_s" .Values.autoscaling.upscaleDelaySeconds
  "downscale_delay_s" .Values.autoscaling.downscaleDelaySeconds) -}}
{{- else -}}
{{- $_ := set $replica "num_replicas" .Values.replicas -}}
{{- end -}}
{{- $gateway := dict "host" "0.0.0.0" "port" .Values.gateway.port "num_replicas" .Values.gateway.replicas "drain_timeout_s" $drain "ray_resource" "sluice_gateway" "metrics_port" .Values.gateway.metricsPort -}}
{{- if .Values.gateway.tls.existingSecret -}}
{{- $_ := set $gateway "tls_cert" "/etc/sluice/tls/tls.crt" -}}
{{- $_ := set $gateway "tls_key" "/etc/sluice/tls/tls.key" -}}
{{- end -}}
{{- if .Values.gateway.tls.clientCa -}}
{{- $_ := set $gateway "tls_client_ca" "/etc/sluice/tls/ca.crt" -}}
{{- end -}}
{{- $store := dict "url" (ternary "env:SLUICE_STORE_URL" "embedded" (ne (include "sluice.redisSecretName" .) "")) -}}
{{- if .Values.redis.kvKey -}}
{{- $_ := set $store "kv_url" "env:SLUICE_KV_STORE_URL" -}}
{{- end -}}
{{- $auth := dict -}}
{{- with .Values.auth -}}
{{- if .existingSecret -}}
{{- $_ := set $auth "tenants_file" (printf "/etc/sluice/auth/%s" .tenantsKey) -}}
{{- end -}}
{{- if .jwtKey -}}
{{- $_ := set $auth "jwt_key_file" (printf "/etc/sluice/auth/%s" .jwtKey) -}}
{{- $_ := set $auth "jwt_algorithm" .jwtAlgorithm -}}
{{- $_ := set $auth "jwt_audience" .jwtAudience -}}
{{- $_ := set $auth "jwt_tenant_claim" .jwtTenantClaim -}}
{{- end -}}
{{- end -}}
{{- $chart := dict
  "model" (dict "path" .Values.model.path "name" .Values.model.name "dtype" .Values.model.dtype "max_model_len" .Values.model.maxModelLen "device" .Values.model.device "quantization" .Values.model.quantization "quantization_group_size" .Values.model.quantizationGroupSize)
  "parallel" (dict "tp" .Values.parallel.tp "pp" .Values.parallel.pp "num_cpus_per_worker" .Values.parallel.cpusPerRank "num_gpus_per_worker" (ternary 1 0 (eq .Values.model.device "cuda")))
  "replica" $replica
  "gateway" $gateway
  "auth" $auth
  "store" $store -}}
{{- toYaml (mergeOverwrite (deepCopy .Values.config) $chart) -}}
{{- end -}}

{{/* The Serve config file. Serve's own proxies stay off: each gateway runs its own gRPC server. */}}
{{- define "sluice.serveConfig" -}}
proxy_location: Disabled
applications:
  - name: sluice
    route_prefix: null
    import_path: cluster.gateway.app:build
    args:
      {{- include "sluice.config" . | nindent 6 }}
{{- end -}}
