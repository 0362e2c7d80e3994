{{/* Environment of every Ray process. */}}
{{- define "sluice.env" -}}
- name: PYTHONUNBUFFERED
  value: "1"
{{- with (include "sluice.redisSecretName" .) }}
- name: SLUICE_STORE_URL
  valueFrom:
    secretKeyRef:
      name: {{ . }}
      key: {{ $.Values.redis.key }}
{{- if $.Values.redis.kvKey }}
- name: SLUICE_KV_STORE_URL
  valueFrom:
    secretKeyRef:
      name: {{ . }}
      key: {{ $.Values.redis.kvKey }}
{{- end }}
{{- end }}
{{- end -}}

{{/* Probes of Ray itself. They are set because KubeRay would inject one that asks Serve's HTTP proxy,
which a gRPC-only application does not run. Weights load in an actor while Ray is alive, under
model.startTimeoutSeconds: no probe kills a pod for it. */}}
{{- define "sluice.rayProbe" -}}
httpGet:
  path: /api/healthz
  port: 52365
periodSeconds: {{ .Values.probes.periodSeconds }}
timeoutSeconds: {{ .Values.probes.timeoutSeconds }}
{{- end -}}

{{- define "sluice.startupAndLivenessProbes" -}}
startupProbe:
  {{- include "sluice.rayProbe" . | nindent 2 }}
  failureThreshold: {{ div (sub (add (int64 .Values.probes.startupSeconds) (int64 .Values.probes.periodSeconds)) 1) (int64 .Values.probes.periodSeconds) }}
livenessProbe:
  {{- include "sluice.rayProbe" . | nindent 2 }}
  failureThreshold: {{ .Values.probes.failureThreshold }}
{{- end -}}

{{/* Tell Ray that the node goes, so that Serve moves its replicas and lets their streams finish, and
hold the pod for that time. Where Ray does not answer, the pod is held all the same. */}}
{{- define "sluice.lifecycle" -}}
{{- $seconds := include "sluice.preStopSeconds" . -}}
preStop:
  exec:
    command:
      - /bin/bash
      - -c
      - |
        timeout {{ $seconds }} ray drain-node --reason DRAIN_NODE_REASON_PREEMPTION \
          --reason-message "the pod is terminating" --deadline-remaining-seconds {{ $seconds }} &
        sleep {{ $seconds }}
{{- end -}}

{{- define "sluice.containerSecurityContext" -}}
allowPrivilegeEscalation: false
capabilities:
  drop: [ALL]
{{- end -}}

{{- define "sluice.podSecurityContext" -}}
runAsNonRoot: true
runAsUser: {{ .Values.podSecurityContext.runAsUser }}
fsGroup: {{ .Values.podSecurityContext.fsGroup }}
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{/* Requests equal limits: Ray plans with what the limits say. A dict of node (its values), gpus. */}}
{{- define "sluice.resources" -}}
cpu: {{ .node.cpu | quote }}
memory: {{ .node.memory }}
{{- with .gpus }}
nvidia.com/gpu: {{ . | quote }}
{{- end }}
{{- end -}}

{{/* Pod template of one kind of node: a dict of root, kind (head, gateway, worker), gpus. */}}
{{- define "sluice.podTemplate" -}}
{{- $root := .root -}}
{{- $node := index $root.Values .kind -}}
{{- $tls := and (eq .kind "gateway") $root.Values.gateway.tls.existingSecret -}}
{{- $auth := and (eq .kind "gateway") $root.Values.auth.existingSecret -}}
{{- $resources := include "sluice.resources" (dict "node" $node "gpus" .gpus) -}}
{{- $claim := $root.Values.model.pvc.claimName -}}
metadata:
  labels:
    {{- include "sluice.selectorLabels" $root | nindent 4 }}
    app.kubernetes.io/component: {{ .kind }}
  {{- with $node.podAnnotations }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  serviceAccountName: {{ include "sluice.serviceAccountName" $root }}
  automountServiceAccountToken: {{ and (eq .kind "head") $root.Values.autoscaling.enabled }}
  securityContext:
    {{- include "sluice.podSecurityContext" $root | nindent 4 }}
  {{- with $root.Values.image.pullSecrets }}
  imagePullSecrets:
    {{- range . }}
    - name: {{ . }}
    {{- end }}
  {{- end }}
  {{- if ne .kind "head" }}
  terminationGracePeriodSeconds: {{ include "sluice.terminationSeconds" $root }}
  {{- end }}
  containers:
    - name: ray-{{ .kind }}
      image: {{ include "sluice.image" $root }}
      imagePullPolicy: {{ $root.Values.image.pullPolicy }}
      securityContext:
        {{- include "sluice.containerSecurityContext" $root | nindent 8 }}
      env:
        {{- include "sluice.env" $root | nindent 8 }}
      ports:
        {{- include (printf "sluice.%sPorts" .kind) $root | nindent 8 }}
      resources:
        requests:
          {{- $resources | nindent 10 }}
        limits:
          {{- $resources | nindent 10 }}
      {{- include "sluice.startupAndLivenessProbes" $root | nindent 6 }}
      readinessProbe:
        {{- include (ternary "sluice.gatewayReadiness" "sluice.rayReadiness" (eq .kind "gateway")) $root | nindent 8 }}
      {{- if ne .kind "head" }}
      lifecycle:
        {{- include "sluice.lifecycle" $root | nindent 8 }}
      {{- end }}
      volumeMounts:
        - name: shared-memory
          mountPath: /dev/shm
        {{- if $claim }}
        - name: model
          mountPath: {{ $root.Values.model.pvc.mountPath }}
          readOnly: true
        {{- end }}
        {{- if $tls }}
        - name: tls
          mountPath: /etc/sluice/tls
          readOnly: true
        {{- end }}
        {{- if $auth }}
        - name: auth
          mountPath: /etc/sluice/auth
          readOnly: true
        {{- end }}
  volumes:
    - name: shared-memory
      emptyDir:
        medium: Memory
        sizeLimit: {{ $node.sharedMemory }}
    {{- if $claim }}
    - name: model
      persistentVolumeClaim:
        claimName: {{ $claim }}
        readOnly: true
    {{- end }}
    {{- if $tls }}
    - name: tls
      secret:
        secretName: {{ $root.Values.gateway.tls.existingSecret }}
    {{- end }}
    {{- if $auth }}
    - name: auth
      secret:
        secretName: {{ $auth }}
    {{- end }}
  {{- range $field := list "nodeSelector" "tolerations" "affinity" }}
  {{- with index $node $field }}
  {{ $field }}:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- end }}
{{- end -}}

{{/* KubeRay refuses a RayService whose head names no port `serve`; nothing listens there. */}}
{{- define "sluice.headPorts" -}}
- name: gcs
  containerPort: 6379
- name: dashboard
  containerPort: 8265
- name: serve
  containerPort: 8000
{{ include "sluice.workerPorts" . }}
{{- end -}}

{{- define "sluice.gatewayPorts" -}}
- name: grpc
  containerPort: {{ .Values.gateway.port }}
{{- if .Values.gateway.metricsPort }}
- name: sluice-metrics
  containerPort: {{ .Values.gateway.metricsPort }}
{{- end }}
{{ include "sluice.workerPorts" . }}
{{- end -}}

{{- define "sluice.workerPorts" -}}
- name: metrics
  containerPort: 8080
{{- end -}}

{{- define "sluice.rayReadiness" -}}
{{- include "sluice.rayProbe" . }}
failureThreshold: {{ .Values.probes.failureThreshold }}
{{- end -}}

{{/* A gateway pod takes calls once grpc.health.v1 says so. The kubelet's gRPC probe speaks no TLS: there
an open port has to do. */}}
{{- define "sluice.gatewayReadiness" -}}
{{- if .Values.gateway.tls.existingSecret -}}
tcpSocket:
  port: {{ .Values.gateway.port }}
{{- else -}}
grpc:
  port: {{ .Values.gateway.port }}
{{- end }}
periodSeconds: {{ .Values.probes.periodSeconds }}
timeoutSeconds: {{ .Values.probes.timeoutSeconds }}
failureThreshold: 2
{{- end -}}
