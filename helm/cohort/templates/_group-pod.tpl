{{- /* A probe of a group behind TLS, at the port that asks for no certificate: the kubelet has none, and its gRPC probes
speak no TLS. */ -}}
{{- define "cohort.groupProbe" -}}
{{- $root := index . 0 -}}
{{- if not $root.Values.metrics.enabled -}}
{{- fail "metrics.enabled is needed where groups have TLS: they are probed at that port" -}}
{{- end -}}
httpGet:
  path: {{ index . 1 }}
  port: metrics
  scheme: HTTPS
{{- end -}}

{{- /* The pod of a group, or of one of its ranks: a dict of root, args, leader (whether routers and probes reach it) and
ranks (how many run in it). */ -}}
{{- define "cohort.groupPod" -}}
{{- $root := .root -}}{{- $values := $root.Values.groups -}}
metadata:
  annotations:
    {{- include "cohort.podAnnotations" (dict "root" $root "annotations" $values.podAnnotations) | nindent 4 }}
  labels:
    {{- include "cohort.selector" $root | nindent 4 }}
    app.kubernetes.io/component: group
    {{- with $values.podLabels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
spec:
  {{- include "cohort.podCommon" (dict "root" $root "part" $values) | nindent 2 }}
  {{- if eq $values.kind "statefulset" }}
  {{- with include "cohort.spread" (dict "root" $root "part" $values "component" "group") | trim }}
  {{- . | nindent 2 }}
  {{- end }}
  {{- end }}
  {{- with $values.runtimeClassName }}
  runtimeClassName: {{ . }}
  {{- end }}
  terminationGracePeriodSeconds: {{ include "cohort.groupGrace" $root }}
  {{- with include "cohort.modelInit" (list $root "weights") | trim }}
  {{- . | nindent 2 }}
  {{- end }}
  containers:
    - name: group
      image: {{ include "cohort.image" $root }}
      imagePullPolicy: {{ $root.Values.image.pullPolicy }}
      args:
        {{- toYaml .args | nindent 8 }}
        - --config=/etc/cohort/cluster.yaml
        - --log-format=json
        - --log-level={{ $values.logLevel }}
      env:
        # Compiled kernels are kept there.
        - name: XDG_CACHE_HOME
          value: /cache
        {{- if and .leader (eq (include "cohort.discovery" $root) "registration") }}
        # A part of the address that it tells routers.
        - name: POD_NAME
          valueFrom:
            fieldRef:
              fieldPath: metadata.name
        {{- end }}
        {{- with $values.env }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      {{- if .leader }}
      ports:
        - name: grpc
          containerPort: {{ $values.port }}
        {{- if $root.Values.metrics.enabled }}
        - name: metrics
          containerPort: {{ $root.Values.metrics.port }}
        {{- end }}
        {{- with include "cohort.followerPorts" (list $root .ranks) | trim }}
        {{- . | nindent 8 }}
        {{- end }}
      # It listens within a second, long before the weights are read.
      startupProbe:
        tcpSocket:
          port: grpc
        periodSeconds: 2
        failureThreshold: {{ max 1 (div (add $values.startupSeconds 1) 2) }}
      # Answers in every phase; a step that hangs ends the process by itself.
      livenessProbe:
        {{- if include "cohort.groupTls" $root }}
        {{- include "cohort.groupProbe" (list $root "/livez") | nindent 8 }}
        {{- else }}
        grpc:
          port: {{ $values.port }}
          service: live
        {{- end }}
        periodSeconds: 10
        timeoutSeconds: 5
        failureThreshold: 3
      # Serving only once the warm-up token is out, and not any more once it drains.
      readinessProbe:
        {{- if include "cohort.groupTls" $root }}
        {{- include "cohort.groupProbe" (list $root "/readyz") | nindent 8 }}
        {{- else }}
        grpc:
          port: {{ $values.port }}
        {{- end }}
        periodSeconds: 2
        timeoutSeconds: 2
        failureThreshold: 2
      {{- else }}
      {{- with include "cohort.followerPorts" (list $root (include "cohort.ranks" $root | int)) | trim }}
      # Of these the one of its rank.
      ports:
        {{- . | nindent 8 }}
      {{- end }}
      {{- end }}
      {{- with include "cohort.preStop" (list $root $values.preStopSeconds) | trim }}
      {{- . | nindent 6 }}
      {{- end }}
      resources:
        {{- $resources := deepCopy $values.resources }}
        {{- if $values.gpu.enabled }}
        {{- $cards := $values.gpu.perPod | default .ranks | int }}
        {{- $resources = mergeOverwrite $resources (dict "limits" (dict $values.gpu.resource $cards)) }}
        {{- end }}
        {{- toYaml $resources | nindent 8 }}
      securityContext:
        {{- toYaml $root.Values.securityContext | nindent 8 }}
      volumeMounts:
        - name: config
          mountPath: /etc/cohort
          readOnly: true
        - name: cache
          mountPath: /cache
        - name: shm
          mountPath: /dev/shm
        {{- with include "cohort.modelMount" $root | trim }}
        {{- . | nindent 8 }}
        {{- end }}
        {{- with include "cohort.secretMounts" (list $root "group") | trim }}
        {{- . | nindent 8 }}
        {{- end }}
  volumes:
    - name: config
      configMap:
        name: {{ include "cohort.fullname" $root }}
    - name: cache
      emptyDir:
        sizeLimit: {{ $values.cacheSize }}
    - name: shm
      emptyDir:
        medium: Memory
        sizeLimit: {{ $values.shmSize }}
    {{- with include "cohort.modelVolume" $root | trim }}
    {{- . | nindent 4 }}
    {{- end }}
    {{- with include "cohort.secretVolumes" (list $root "group") | trim }}
    {{- . | nindent 4 }}
    {{- end }}
{{- end -}}
